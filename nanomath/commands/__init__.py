"""Entry points: each command reads its config, builds the parts and runs them."""
