"""Which model answers a request: what it needs, what each model can do, what it costs, who may have it."""
