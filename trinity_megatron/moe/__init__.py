"""The mixture-of-experts layer: router, expert bias, dispatch, experts."""
