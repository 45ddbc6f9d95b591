"""Penstock: pipe/schedule."""
