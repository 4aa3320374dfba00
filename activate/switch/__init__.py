"""The switch process' side of a deployment: whatever changes the machine."""
