"""A fleet in virtual time: the services' own control plane and a real Redis, with engines that only take their time."""
