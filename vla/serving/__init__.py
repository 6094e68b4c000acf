"""Policies over the network: a websocket server and a light client in openpi's wire format."""
