"""gRPC servicers, conversion and interceptors. Runs in the server process on the event loop."""
