"""What dsv4fuse offers beside the pass for models of other libraries, one module for each."""
