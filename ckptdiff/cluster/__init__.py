"""Have the nodes of a Ray cluster do the tasks of a run; Ray places them, runs them again and brings their results."""
