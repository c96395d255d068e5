"""Where the time of a call went, worker by worker: what was recorded, and the forms in which it is written."""
