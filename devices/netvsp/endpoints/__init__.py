"""Endpoints: what can be behind a network adapter."""
