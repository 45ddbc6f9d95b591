"""Penstock: pipe."""
