"""Reading files that may come from elsewhere: bounded memory and time, no path out of a folder."""
