"""Many runs and one table: configs, settings, seeds and baselines, in parallel on this machine."""
