"""Trained models, asked in the engines they are for."""
