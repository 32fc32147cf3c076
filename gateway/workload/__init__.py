"""Workload identities: whose certificate is a member's, and what one member tells another of the user for whom it acts."""
