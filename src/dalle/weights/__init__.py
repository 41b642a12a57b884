"""Public weights in the form of a run, and runs in the forms of public libraries."""
