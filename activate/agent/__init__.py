"""The agent's side of a deployment: attempts, downloads, ends that no switch process writes."""
