"""The switch process' side of a deployment: all steps that change the machine."""
