"""What became of a model: measured from the written files, put side by side, shown to a person."""
