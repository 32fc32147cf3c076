"""The service mesh: identities, the control plane, and its members: sidecars and edges."""
