"""What a task embedding is compared with: other ways to move a task into a frozen model. See `interventions.comparison`."""
