"""The management API: for programs, all that the pages do. Described by /api/v1/openapi.json."""
