"""The kdb command."""
