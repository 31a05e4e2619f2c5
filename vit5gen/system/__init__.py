"""The machine: its processes, its arithmetic, its files, and the errors that its users meet."""
