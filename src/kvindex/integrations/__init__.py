"""Integrations with other routers: one module each, with an extra of the same name, over the public API of kvindex."""
