"""What the subcommands of `polyvox` do that are more than a call."""
