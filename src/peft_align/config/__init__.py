"""Configuration: the schema, its composition from YAML and the command line, and the identity of a run."""
