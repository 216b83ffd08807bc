"""Generated from proto/attention.proto by tools/generate_proto.py."""
