"""Everything around Triton: the model repository, the server, the client and the benchmark."""
