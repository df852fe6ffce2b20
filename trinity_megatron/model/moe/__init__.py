"""The mixture-of-experts layer: router, expert bias, token dispatch, experts."""
