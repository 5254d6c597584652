"""Bytes in and bytes out: positioned reads from files, and the one durable writer."""
