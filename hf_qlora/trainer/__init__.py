"""What `Trainer` gets wrong or leaves unsaid around its steps, for models with an adapter of ours."""
