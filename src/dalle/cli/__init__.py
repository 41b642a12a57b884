"""The command `dalle` and what its subcommands do with Hydra, which is imported nowhere else."""
