"""All that touches the machine, with the standard library alone, so that it starts in milliseconds."""
