"""How the container is deployed: SaladCloud, Kubernetes, several replicas on one host."""
