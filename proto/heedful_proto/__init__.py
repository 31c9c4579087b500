"""Contract on the wire: the generated heedful.v1 modules. Imports only protobuf and grpc."""
