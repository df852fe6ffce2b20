"""Raw text that is read, tokenised and packed while a run goes on."""
