"""seqio tasks; imported as `gkd_jax.tasks` (see setup.py)."""
