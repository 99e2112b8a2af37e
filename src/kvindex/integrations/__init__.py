"""The routers of others: a module for each, with an extra of the same name, over the public face of kvindex."""
