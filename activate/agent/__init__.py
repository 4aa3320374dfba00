"""The agent's side of a deployment: downloads, attempts, and the end."""
