"""Watches over running workers: head node, nodes, hangs, requests to stop."""
