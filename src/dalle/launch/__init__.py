"""Jobs in processes of their own: sweeps, hyperparameter search. One run is `dalle.training.fit`."""
