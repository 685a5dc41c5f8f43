"""Facts about FX graphs, stated once: names and arguments of ops, what ops do beside computing, attributes by path."""
