"""Why an attempt failed, or does not start: from what Kubernetes and the pods say. All pure."""
