"""Speed and size: of the engine, of the server, of peers, and of what a load needs."""
