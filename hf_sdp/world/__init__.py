"""Nobody waits for ever: what goes wrong on one worker is an error on all of them. And process groups, and what their
collectives send."""
