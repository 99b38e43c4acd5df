// Which links a reply may contain.

export const LINK = /^(https?:\/\/|mailto:)/i;
