"""The command line of `cachix-workspace`: one file for each group of commands."""
