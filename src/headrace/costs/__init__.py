"""What a model costs, in plain arithmetic: for the engine that spends and the planner that predicts."""
