"""How much memory does training take: measured here, and forecast?"""
