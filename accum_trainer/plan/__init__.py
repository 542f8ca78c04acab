"""Memory per engine and batch size before anything is allocated."""
