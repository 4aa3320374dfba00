"""All that touches the machine; standard library only, so that it starts in milliseconds."""
