"""Deployment to SaladCloud."""
